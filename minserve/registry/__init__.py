"""What is served: the model store, and the models with their versions."""
