"""Request envelopes: they turn the format of a platform into what handlers take, and back."""
