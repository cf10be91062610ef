NAME = "facts"
