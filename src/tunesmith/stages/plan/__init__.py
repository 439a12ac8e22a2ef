"""Stage `plan`: what a training would take, before it is run. So far its exact tier: `trace`."""
