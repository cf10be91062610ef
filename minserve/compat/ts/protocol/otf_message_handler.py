"""Where older handlers import the streaming function from. Of TorchServe's protocol nothing else is here."""

from ..handler_utils.utils import send_intermediate_predict_response

__all__ = ["send_intermediate_predict_response"]
