"""`compression-plugins bench` and `report`: does compression help, measured by real jobs on an emulated network."""
