"""Pictures of what a job did, of records that `ringmpi attend --json` wrote; and of which rank computes which pairs."""
