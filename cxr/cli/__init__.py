"""The program `cxr`: its commands, and code that they share."""
