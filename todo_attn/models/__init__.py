"""Models for the commands: named architectures, UNets made from them, pipelines loaded from wherever they are."""
