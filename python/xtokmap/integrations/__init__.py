"""What plugs into other people's engines, a file for each; none is imported before it is asked for."""
