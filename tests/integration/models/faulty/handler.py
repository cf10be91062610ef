"""Does what the request says, on the ranks it says, then adds the request's number up over the ranks."""

import json
import os
import re
import signal
import socket
import time

import torch
import torch.distributed as dist

from minserve.handlers import BaseHandler


class Faulty(BaseHandler):
    def load(self, context):
        pass

    def handle(self, data, context):
        order = json.loads(data[0]["body"])
        if self.rank in order.get("ranks", []):
            getattr(self, order["do"])(order)
        if order.get("do") == "shift":
            return self.shift()
        total = torch.tensor([float(order.get("value", 1))])
        if self.rank not in order.get("without", []):
            dist.all_reduce(total)
        if self.rank in order.get("after", []):
            getattr(self, order["do"])(order)
        if order.get("bad") == "count":
            return ["one", "two"]
        if order.get("bad") == "type":
            return [{"unserialisable": object()}]
        return [{"sum": total.item()}]

    def fail(self, order):
        raise ValueError(f"told to fail on rank {self.rank}" if order.get("own_text") else "told to fail")

    def shift(self):
        """Raises at one line on both ranks, but on rank 1 behind one more collective that nobody waits for."""
        for step in range(2):
            if step == self.rank:
                raise ValueError("share out of range")
            dist.all_reduce(torch.ones(1), async_op=True)

    def fail_each(self, order):
        if self.rank == 0:
            raise KeyError("rank 0's own")
        raise ValueError("rank 1's own")

    def hang(self, order):
        time.sleep(3600)

    def gil(self, order):
        """A call into C that does not let go of the GIL."""
        re.match("(a+)+b", "a" * 64)

    def stop(self, order):
        os.kill(os.getpid(), signal.SIGSTOP)

    def leave(self, order):
        os._exit(order.get("code", 0))

    def kill(self, order):
        os.kill(os.getpid(), signal.SIGKILL)

    def segfault(self, order):
        os.kill(os.getpid(), signal.SIGSEGV)

    def close_socket(self, order):
        self._link().shutdown(socket.SHUT_RDWR)
        time.sleep(3600)

    def garbage(self, order):
        self._link().sendall(b"this is no frame at all, whatever you think of it")

    def sleep(self, order):
        time.sleep(order["seconds"])

    def grandchild(self, order):
        if os.fork() == 0:
            time.sleep(3600)

    @staticmethod
    def _link():
        from minserve.rank import streaming

        return streaming.current()._connection.socket
