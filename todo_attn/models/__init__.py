"""Models for the commands: named architectures, UNets made from them, pipelines from a folder, a file or the Hub."""
