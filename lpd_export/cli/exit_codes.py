"""How `lpd-export` ends: the codes that scripts rely on. 0 is success."""

EXIT_FAILED = 1
"""A verification that did not pass, and nothing else."""
EXIT_MISTAKE = 2
"""A mistake in what was asked for: one line says which."""
EXIT_FAULT = 70
"""A fault of lpd-export itself: a traceback, and a line that asks for a report."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, a polite kill or a closed terminal; what is finished is kept."""
EXIT_READER_GONE = 141
"""What reads standard output closed it, as `| head -1` does; nothing is said."""
