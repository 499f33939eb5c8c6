"""The heart: rules as literals, the layout of a GPT, and the table that they make together."""
