"""Scaling laws: from finished runs to fits that predict, with intervals and what is not known.

Each law is a function from runs to a frozen fit with its parameters, their `intervals`, the
`residuals`, `notes` in plain words about what the runs do not identify, and `predict`. Needs numpy
and scipy only.

    runs = read_runs("runs.csv")
    fit = fit_chinchilla(runs)
    fit.predict_interval(n_params=1.3e10, tokens=2.6e11)
"""

from mupgpt.scaling.annealing import AnnealingFit, LossCurve, annealing_areas, fit_annealing
from mupgpt.scaling.batch import CriticalBatchFit, fit_batch_law, fit_critical_batch
from mupgpt.scaling.chinchilla import (
    HOFFMANN_2022,
    REPLICATION_2024,
    ChinchillaFit,
    ChinchillaLaw,
    Optimum,
    fit_chinchilla,
    synthetic_isoflop,
    synthetic_runs,
)
from mupgpt.scaling.compute import ComputeFit, LogComputeFit, fit_compute, fit_log_compute
from mupgpt.scaling.frontier import FrontierFit, fit_envelope, fit_isoflop
from mupgpt.scaling.inference import FlopCost, InferenceOptimum, inference_optimum
from mupgpt.scaling.linear import LinearFit, PowerFit, fit_linear, fit_loglog
from mupgpt.scaling.optimal import OptimalFit, SweepOptimum, fit_optimal, interpolated_minimum
from mupgpt.scaling.overtraining import (
    DownstreamFit,
    OvertrainingFit,
    fit_downstream,
    fit_overtraining,
)
from mupgpt.scaling.resample import Interval
from mupgpt.scaling.runs import Runs, read_replication, read_runs
from mupgpt.scaling.sizes import average_params, average_params_along, sparse_params
from mupgpt.scaling.steptime import (
    ShapeChoice,
    Shapes,
    StepTimeFit,
    best_shape,
    fit_step_time,
    memory_copies,
)
from mupgpt.scaling.timescale import (
    adamw_timescale,
    decay_for_timescale,
    ema_weights,
    fit_timescale,
    timescale_fraction,
)

__all__ = [
    "HOFFMANN_2022",
    "REPLICATION_2024",
    "AnnealingFit",
    "ChinchillaFit",
    "ChinchillaLaw",
    "ComputeFit",
    "CriticalBatchFit",
    "DownstreamFit",
    "FlopCost",
    "FrontierFit",
    "InferenceOptimum",
    "Interval",
    "LinearFit",
    "LogComputeFit",
    "LossCurve",
    "OptimalFit",
    "Optimum",
    "OvertrainingFit",
    "PowerFit",
    "Runs",
    "ShapeChoice",
    "Shapes",
    "StepTimeFit",
    "SweepOptimum",
    "adamw_timescale",
    "annealing_areas",
    "average_params",
    "average_params_along",
    "best_shape",
    "decay_for_timescale",
    "ema_weights",
    "fit_annealing",
    "fit_batch_law",
    "fit_chinchilla",
    "fit_compute",
    "fit_critical_batch",
    "fit_downstream",
    "fit_envelope",
    "fit_isoflop",
    "fit_linear",
    "fit_log_compute",
    "fit_loglog",
    "fit_optimal",
    "fit_overtraining",
    "fit_step_time",
    "fit_timescale",
    "inference_optimum",
    "interpolated_minimum",
    "memory_copies",
    "read_replication",
    "read_runs",
    "sparse_params",
    "synthetic_isoflop",
    "synthetic_runs",
    "timescale_fraction",
]
