"""What watches a run: its metrics, where its time goes, traces, a watchdog."""
