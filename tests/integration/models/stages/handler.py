"""A pipeline that does what the request says, where it says, and makes 3 · x + stage + 1 of its numbers in each stage.

What it keeps on itself in front of `run` it needs behind it, as many handlers do. With several ranks in a stage each has a
share of the numbers, and they are put together with a collective.
"""

import os
import time

import torch
import torch.distributed as dist

from minserve.handlers import BaseHandler, Pipeline, build_mesh
from minserve.rank.failures import StageError

PATIENCE_S = 20


class Stages(BaseHandler):
    def load(self, context):
        self.tp = context.model_yaml_config.get("handler", {}).get("tp", 1)
        mesh = build_mesh(self.device, self.tp) if self.tp > 1 else None
        self.group = mesh.get_group("tp") if mesh else None
        with torch.device("meta"):  # as models are built whose weights are read later
            self.pipeline = Pipeline(self.device, mesh)
        self.seen = 0
        self.outputs = {}
        torch.set_grad_enabled(False)  # which torch keeps for each thread

    def handle(self, data, context):
        self.order = data[0]["body"]
        self.seen += 1
        self.obey("before")
        caught = None
        result = (torch.full(self.order["shape"], float(self.order["nonce"])),)
        for number in range(1, self.order.get("rounds", 1) + 1):
            self.round = number
            if number > 1:
                self.obey("between")
            try:
                result = self.pipeline.run(self.stage, *(result or ()))
            except StageError as error:
                if "catch" not in self.order:
                    raise
                caught = str(error)
                if self.order["catch"] == "leave":
                    break
        if caught is not None:
            return [{"caught": caught}]
        self.obey("after")
        if result is None:
            return None
        context.set_response_header(0, "X-Nonce", str(self.order["nonce"]))
        numbers = result[0]
        self.together(numbers)
        return [{"nonce": self.order["nonce"], "values": numbers.unique().tolist(), "shape": list(numbers.shape)}]

    def stage(self, numbers):
        self.obey("stage")
        assert not torch.is_grad_enabled()
        result = self.together(numbers * 3 + self.pipeline.stage + 1)
        if not self.order.get("reuse"):
            return result
        return self.outputs.setdefault(result.shape, torch.empty_like(result)).copy_(result)  # as a captured graph does

    def together(self, numbers):
        """The same numbers, each of them from one rank of the stage: wrong, if those are at different batches."""
        if self.tp == 1:
            return numbers
        mine = torch.zeros_like(numbers)
        share = slice(dist.get_rank(self.group), None, self.tp)
        mine.view(-1)[share] = numbers.view(-1)[share]
        dist.all_reduce(mine, group=self.group)
        assert torch.equal(mine, numbers)
        return mine

    def obey(self, where):
        """Carries out what the request has for this place: in a stage, {"raise": ["stage", 1]}, or around it on a rank.

        In the pipeline and between two runs of it, with {"round": 2}, only for the second.
        """
        if where in ("stage", "between") and self.order.get("round", self.round) != self.round:
            return
        number = self.pipeline.stage if where == "stage" else self.rank
        for verb in ("raise", "touch", "await", "sleep", "talk", "hang"):
            place, *numbers = self.order.get(verb, [None])
            if place == where and number in numbers:
                getattr(self, f"do_{verb}")()

    def do_raise(self):
        raise LookupError(f"told to by {self.order['nonce']}")

    def do_touch(self):
        open(self.order["file"], "w").close()

    def do_await(self):
        """Only another batch, that this rank's or another one's code works on meanwhile, lets it go on."""
        until = time.monotonic() + PATIENCE_S
        while not os.path.exists(self.order["file"]):
            if time.monotonic() > until:
                raise TimeoutError("the next batch has not begun meanwhile")
            time.sleep(0.001)

    def do_sleep(self):
        time.sleep(0.05)

    def do_hang(self):
        time.sleep(3600)  # until it is killed

    def do_talk(self):
        """A collective of all ranks, outside of the pipeline: it must meet the same batch's on each."""
        nonce = torch.tensor([float(self.order["nonce"])])
        dist.all_reduce(nonce)
        assert nonce.item() == self.order["nonce"] * self.world_size
