"""Better codes at the same bytes: quantisation by what the layers compute."""

from jaxbnb.calibration._calibrate import calibrate
from jaxbnb.calibration._compare import Comparison, compare
from jaxbnb.calibration._fit_adapter import FittedLayer, fit_adapter
from jaxbnb.calibration._matrix import LayerReport
from jaxbnb.calibration._merge import MergedModel, merge_calibrated
from jaxbnb.calibration._params import calibrate_params
from jaxbnb.calibration._solver import minimize_error, search_scales
from jaxbnb.calibration._tune import tune

__all__ = [
    "Comparison",
    "FittedLayer",
    "LayerReport",
    "MergedModel",
    "calibrate",
    "calibrate_params",
    "compare",
    "fit_adapter",
    "merge_calibrated",
    "minimize_error",
    "search_scales",
    "tune",
]
