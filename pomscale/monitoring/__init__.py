"""Monitoring of a run: metric sinks, alerts, throughput, host, profiler window, wandb, report."""
