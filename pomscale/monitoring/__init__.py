"""What a run tells about itself: metric sinks, throughput, host, profiler window, report."""
