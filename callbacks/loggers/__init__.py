"""The run's directory, and curves and pictures in any of Lightning's loggers."""
