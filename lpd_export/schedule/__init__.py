"""Which cells are generated in which step: group sizes, orders, phases, and the schedule file."""
