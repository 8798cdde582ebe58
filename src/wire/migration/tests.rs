use super::*;

fn spec(streams: &[u16]) -> SendSpec {
    SendSpec { streams: streams.iter().copied().map(FdIndex).collect(), limits: SendLimits::default() }
}

#[test]
fn streams_are_counted_and_each_is_another_descriptor() {
    assert!(spec(&[0, 1, 2]).check(3).is_ok());
    for (streams, descriptors, field) in [
        (&[][..], 0, "/streams"),
        (&[0; 17], 17, "/streams"),
        (&[0, 0], 2, "/streams/1"),
        (&[0, 2], 2, "/streams/1"),
    ] {
        assert_eq!(spec(streams).check(descriptors).unwrap_err().field, field);
    }
}

#[test]
fn limits_that_no_move_can_keep_to_are_refused() {
    for (downtime_ms, bandwidth_bytes_per_s, field) in [
        (0, None, "/limits/downtime_ms"),
        (DOWNTIME_MS_MAX + 1, None, "/limits/downtime_ms"),
        (1, Some(BANDWIDTH_BYTES_MIN - 1), "/limits/bandwidth_bytes_per_s"),
    ] {
        let limits = SendLimits { downtime_ms, bandwidth_bytes_per_s };
        assert_eq!(limits.check().unwrap_err().field, field);
    }
    assert!(SendLimits { downtime_ms: 1, bandwidth_bytes_per_s: Some(BANDWIDTH_BYTES_MIN) }.check().is_ok());
}
