"""What happens beside the reduction of gradients: directions around it, hooks around the step."""
