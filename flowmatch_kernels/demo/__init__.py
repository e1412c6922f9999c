"""The demo: learns real flight trajectories, and samples them with the published loop and with ours."""
