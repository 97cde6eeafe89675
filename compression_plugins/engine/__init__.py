"""From a configuration and named tensors to reduced ones, for every host: plan, state, driver, session, telemetry."""
