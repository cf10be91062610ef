"""A handler as most people write them: BaseHandler with its own ends."""

import torch
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import map_class_to_label


class Numbers(BaseHandler):
    """Three numbers to two classes."""

    def preprocess(self, data):
        """JSON lists to one tensor."""
        rows = [row if isinstance(row, list) else row.get("data") or row.get("body") for row in data]
        return torch.tensor([row["data"] if isinstance(row, dict) else row for row in rows], dtype=torch.float32)

    def postprocess(self, data):
        """Probabilities with the names of their classes."""
        rounded = [[round(value, 4) for value in row] for row in data.tolist()]
        return map_class_to_label(rounded, self.mapping, [[0, 1]] * len(rounded))

    def get_insights(self, tensor_data, raw_data, target):
        """What explanations answer."""
        return [{"shape": list(tensor_data.shape), "target": target}]
