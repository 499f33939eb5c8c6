"""Step time from memory copies and FLOPs, and the best shape for a time budget."""

from dataclasses import replace

import numpy as np
import pytest

from mupgpt.config.schema import GPTConfig
from mupgpt.scaling import HOFFMANN_2022, Shapes, best_shape, fit_step_time, memory_copies

SHAPE = GPTConfig(n_layer=3, d_model=8, d_ffn=32, n_head=2, vocab_size=50, seq_len=16)
TRUE = {"overhead": 5e-3, "per_copy": 2e-10, "per_flop": 1e-12}
COPIES = np.array([1e7, 3e7, 5e7, 1e8, 2e8, 3e8, 6e8, 1e9, 1.5e9, 4e9])
FLOPS = np.array([5e8, 6e9, 4e9, 3e10, 2e10, 9e10, 6e10, 4e11, 2e11, 1e12])


def seconds(noise=0.0, seed=0):
    exact = TRUE["overhead"] + TRUE["per_copy"] * COPIES + TRUE["per_flop"] * FLOPS
    return exact * (1 + noise * np.random.default_rng(seed).standard_normal(10))


def test_coefficients_are_recovered_inside_their_intervals_in_95_of_100_samples():
    fits = [fit_step_time(seconds(0.03, s), COPIES, FLOPS) for s in range(300)]
    hits = np.mean([[f.intervals[n].covers(v) for n, v in TRUE.items()] for f in fits], axis=0)
    assert np.all(np.abs(hits - 0.95) < 3.5 * np.sqrt(0.95 * 0.05 / 300)), hits


def test_r2_is_that_of_the_seconds():
    fit = fit_step_time(seconds(0.03), COPIES, FLOPS)
    miss = seconds(0.03) - fit.predict(COPIES, FLOPS)
    total = seconds(0.03) - seconds(0.03).mean()
    assert fit.r2 == pytest.approx(1 - (miss @ miss) / (total @ total), rel=1e-12)
    assert 0.98 < fit.r2 < 1
    np.testing.assert_allclose(fit.residuals, miss / seconds(0.03), rtol=1e-9, atol=1e-12)


def test_every_shape_weighs_alike_so_small_ones_are_predicted_too():
    fit = fit_step_time(seconds(0.03), COPIES, FLOPS)
    assert fit.predict(1e7, 5e8) == pytest.approx(seconds()[0], rel=0.06)
    assert fit.predict_interval(1e7, 5e8).covers(seconds()[0])
    wide = fit.predict_interval(4e9, 1e12)
    assert wide.covers(seconds()[-1])
    assert wide.high - wide.low > 10 * (np.diff(fit.predict_interval(1e7, 5e8))[0])


def test_units_of_time_copies_and_flops_do_not_matter():
    plain = fit_step_time(seconds(0.03), COPIES, FLOPS)
    scaled = fit_step_time(1e3 * seconds(0.03), COPIES / 1e9, FLOPS / 1e12)
    assert scaled.predict(0.5, 0.1) == pytest.approx(1e3 * plain.predict(5e8, 1e11), rel=1e-9)
    assert scaled.r2 == pytest.approx(plain.r2, rel=1e-9)


def test_what_the_shapes_do_not_tell_is_refused_or_said():
    with pytest.raises(ValueError, match="cannot be told apart"):
        fit_step_time(seconds(), COPIES, 100 * COPIES)
    with pytest.raises(ValueError, match=r"seconds has 3 values: .*at least 4"):
        fit_step_time(seconds()[:3], COPIES[:3], FLOPS[:3])
    with pytest.raises(ValueError, match=r"seconds\[0\] = 0"):
        fit_step_time([0.0, 1.0, 2.0, 3.0], COPIES[:4], FLOPS[:4])
    only_copies = TRUE["overhead"] + TRUE["per_copy"] * COPIES
    noisy = only_copies * (1 + 0.05 * np.random.default_rng(1).standard_normal(10))
    notes = fit_step_time(noisy, COPIES, FLOPS).notes
    assert notes[0].startswith("per_flop is not identified")


def test_copies_of_a_matmul_only_count_by_hand():
    """One layer, one head: read and write every operand of every operation, three times."""
    rows, d, f, v, t = 4, 2, 8, 10, 4
    qkvo = 4 * (rows * d + d * d + rows * d)
    scores = (2 * rows * d + t * t) + 2 * t * t + (t * t + rows * d + rows * d)
    ffn = (rows * d + d * f + rows * f) + 2 * rows * f + (rows * f + f * d + rows * d)
    norms, adds = 2 * 2 * rows * d, 2 * 3 * rows * d
    ends = 2 * rows * d + 2 * rows * d + (rows * d + d * v + rows * v) + 2 * rows * v
    model = GPTConfig(n_layer=1, d_model=d, d_ffn=f, n_head=1, vocab_size=v, seq_len=t)
    counted = memory_copies(model, batch=1)
    assert counted == 3 * (qkvo + scores + ffn + norms + adds + ends)


def test_copies_are_linear_in_depth_and_fusing_saves_exactly_the_score_matrix():
    three, four, five = (memory_copies(replace(SHAPE, n_layer=n), 4) for n in (3, 4, 5))
    assert five - three == 2 * (four - three)
    scores = 4 * SHAPE.n_head * SHAPE.seq_len**2
    assert three - memory_copies(SHAPE, 4, fused_attention=True) == 3 * SHAPE.n_layer * 4 * scores


def test_best_shape_reaches_the_least_loss_in_the_time():
    fit = fit_step_time(seconds(), COPIES, FLOPS)
    n_params = np.array([1e6, 1e7, 1e8])
    copies, flops = 40 * n_params, 6 * n_params * 8192
    choice = best_shape(
        fit,
        HOFFMANN_2022,
        Shapes(n_params=n_params, copies=copies, flops=flops),
        seconds=86400,
        tokens_per_step=8192,
    )
    np.testing.assert_array_equal(choice.steps, np.floor(86400 / choice.seconds_per_step))
    np.testing.assert_array_equal(choice.loss, HOFFMANN_2022.loss(n_params, choice.steps * 8192))
    assert choice.best == int(np.argmin(choice.loss)) == 1


def test_of_two_shapes_with_one_count_the_faster_is_chosen():
    fit = fit_step_time(seconds(), COPIES, FLOPS)
    choice = best_shape(
        fit,
        HOFFMANN_2022,
        Shapes(n_params=[1e7, 1e7], copies=[9e8, 4e8], flops=[5e11, 5e11]),
        seconds=3600,
        tokens_per_step=8192,
    )
    assert choice.best == 1


def test_a_time_shorter_than_a_step_is_refused():
    fit = fit_step_time(seconds(), COPIES, FLOPS)
    with pytest.raises(ValueError, match=r"seconds = 0\.001 is less than one step"):
        best_shape(
            fit,
            HOFFMANN_2022,
            Shapes(n_params=[1e7], copies=[4e8], flops=[5e11]),
            seconds=1e-3,
            tokens_per_step=8192,
        )
