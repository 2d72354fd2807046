"""What one worker does: a trial on its cells, epoch by epoch."""
