"""What happens beside the reduction of gradients: local directions before it, hooks around the step."""
