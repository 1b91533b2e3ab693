"""What a run costs, by formula."""
