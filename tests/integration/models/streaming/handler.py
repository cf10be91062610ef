"""Streams as it is told, with an all-reduce in each step, and knows afterwards how many steps each rank has taken."""

import json
import os
import threading
import time

import torch
import torch.distributed as dist
from ts.handler_utils.utils import send_intermediate_predict_response

import minserve
from minserve.handlers import BaseHandler


class Streaming(BaseHandler):
    def load(self, context):
        self.taken = 0  # steps of the last stream
        self.cleaned_up = 0
        self.probes = 0

    def probe(self):
        """A collective of its own: it must stay paired with nothing but itself."""
        total = torch.ones(1)
        dist.all_reduce(total)
        self.probes += 1
        return total.item() == self.world_size

    def handle(self, data, context):
        order = json.loads(data[0]["body"])
        return getattr(self, order["do"])(order, context)

    def add(self, order, context):
        total = torch.tensor([float(order["value"])])
        dist.all_reduce(total)
        return [json.dumps({"sum": total.item()})] * len(context.request_ids)

    def look(self, order, context):
        """What each rank remembers of the last stream."""
        mine = torch.tensor([self.taken, self.cleaned_up, self.probes])
        everyone = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return [[ranks.tolist() for ranks in everyone]]

    def die_once(self, order, context):
        """Kills rank 1 unless the file says that it has done so before."""
        if self.rank == 1 and not os.path.exists(order["file"]):
            open(order["file"], "w").close()
            os._exit(9)
        return self.add(order, context)

    def step(self, order):
        total = torch.ones(1)
        dist.all_reduce(total)
        self.taken += 1
        time.sleep(order.get("pause", 0))
        return f"{self.taken} " if order.get("numbered") else "x" * order.get("size", 1)

    def generate(self, order, context):
        self.taken = self.cleaned_up = 0
        try:
            for _ in range(order["steps"]):
                yield [self.step(order)]
        finally:
            self.cleaned_up = 1

    def from_a_thread(self, order, context):
        self.taken = self.cleaned_up = 0

        def work():
            try:
                for _ in range(order["steps"]):
                    chunk = self.step(order)
                    send_intermediate_predict_response([chunk], context.request_ids, "", 200, context)
            except minserve.Cancelled:
                self.cleaned_up = 1
                raise

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return ["end"]

    def rank_0_alone(self, order, context):
        self.taken = self.cleaned_up = 0
        for _ in range(order["steps"]):
            chunk = self.step(order)
            if self.rank == 0:
                send_intermediate_predict_response([chunk], context.request_ids, "", 200, context)
        return ["end"]
