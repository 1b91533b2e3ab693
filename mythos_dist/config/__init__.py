"""What a run is, as frozen dataclasses. Imports nothing else of ours but the errors."""
