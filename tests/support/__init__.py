"""What tests share: models, recipes, runs, commands, hostile inputs."""
