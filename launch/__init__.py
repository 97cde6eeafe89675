"""What a person runs: the demonstration (`python -m launch.demo`) and the laboratory network it runs on."""
