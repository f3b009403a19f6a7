"""Quality of every method on one pipeline, against dense and against true images."""
