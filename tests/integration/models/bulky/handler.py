"""No collective: rank 0 answers whether rank 1 keeps up or not."""


class Bulky:
    def handle(self, data, context):
        return [str(len(row["body"])) for row in data]
