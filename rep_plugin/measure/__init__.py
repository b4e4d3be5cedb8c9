"""What every verb measures: the proof of equality, costs, latency, reports and plots."""
