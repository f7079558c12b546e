"""What is on a picture: a few pictures in memory, or millions into a file."""

from fasternet.predict.files import predict_to_file
from fasternet.predict.predictor import Prediction, Predictor, create_inference_model, load_weights

__all__ = ["Prediction", "Predictor", "create_inference_model", "load_weights", "predict_to_file"]
