"""What ToDo and DaTo would gain: predicted from counted operations and the machine's rates, or timed."""
