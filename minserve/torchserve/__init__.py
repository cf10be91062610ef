"""TorchServe's command, `minserve torchserve`: its flags, its configuration files, its logs."""
