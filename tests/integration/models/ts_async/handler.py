"""As a TorchServe user writes it for asyncCommunication: requests wait for each other, and one streams."""

import asyncio

from ts.handler_utils.utils import send_intermediate_predict_response


class AsyncHandler:
    def initialize(self, context):
        self.waiting = {}
        self.initialized = True

    async def handle(self, data, context):
        word = bytes(data[0]["body"]).decode()
        if word.startswith("stream"):
            send_intermediate_predict_response([word], context.request_ids, "Intermediate", 200, context)
            return [" ends"]
        if word.startswith("wake "):
            self.waiting.pop(word.removeprefix("wake ")).set_result(word)
            return ["woke"]
        if word == "waiting":
            return [sorted(self.waiting)]
        self.waiting[word] = asyncio.get_running_loop().create_future()
        try:
            return [f"{word}: {await self.waiting[word]}"]
        finally:
            self.waiting.pop(word, None)
