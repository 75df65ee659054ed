"""What people look at: model cards and pages."""
