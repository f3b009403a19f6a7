"""What ToDo and DaTo would gain: operations counted, over what the machine does in a second, or timed."""
