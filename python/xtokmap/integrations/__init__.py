"""Inside the trainers that people use: a module for each, named after it, which needs its package."""
