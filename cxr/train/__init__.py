"""Training on Ray Train: `fit()` and what a run is laid out by."""

from cxr.train.fit import Fitted, TrainingStopped, begun_with, check_resume, fit
from cxr.train.options import RunOptions
from cxr.train.prepare import prepare

__all__ = ["Fitted", "RunOptions", "TrainingStopped", "begun_with", "check_resume", "fit", "prepare"]
