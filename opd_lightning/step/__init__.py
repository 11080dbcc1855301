"""Parts of the training step: verdicts, advantages and teachers' scores, what is logged, what a checkpoint holds."""
