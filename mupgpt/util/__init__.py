"""Small helpers without a subject of their own: text, progress, stopping, bundled files."""
