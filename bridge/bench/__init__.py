"""Benchmarks: real gateways in the lab under a load generator that speaks the real protocol (docs/performance.md)."""
