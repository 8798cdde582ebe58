use super::*;

fn spec(streams: &[u16]) -> SendSpec {
    let streams = streams.iter().copied().map(FdIndex).collect();
    let (limits, mode) = Default::default();
    SendSpec { streams, disks: Vec::new(), handed: false, limits, mode, held: false, paused: false }
}

#[test]
fn each_disk_is_named_once_and_has_a_stream_of_its_own() {
    let with = |disks: &[(u16, u16)]| {
        let of = |(disk, stream): &(u16, u16)| DiskStream { disk: *disk, stream: FdIndex(*stream) };
        SendSpec { disks: disks.iter().map(of).collect(), ..spec(&[0]) }
    };
    assert!(with(&[(0, 1), (3, 2)]).check(3).is_ok());
    for (disks, field) in [(&[(0, 0)], "/disks/0/stream"), (&[(0, 3)], "/disks/0/stream")] {
        assert_eq!(with(disks).check(3).unwrap_err().field, field);
    }
    assert_eq!(with(&[(1, 1), (1, 2)]).check(3).unwrap_err().field, "/disks/1/disk");
    assert_eq!(check_disks(&with(&[(2, 1)]).disks, Some(2)).unwrap_err().field, "/disks/0/disk");
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
        let limits = SendLimits { downtime_ms, bandwidth_bytes_per_s, ..SendLimits::default() };
        assert_eq!(limits.check().unwrap_err().field, field);
    }
    assert!(
        SendLimits {
            downtime_ms: 1,
            bandwidth_bytes_per_s: Some(BANDWIDTH_BYTES_MIN),
            ..SendLimits::default()
        }
        .check()
        .is_ok()
    );
}

#[test]
fn what_is_handed_over_needs_one_stream_and_no_disks() {
    let handed = |streams: &[u16]| SendSpec { handed: true, ..spec(streams) };
    assert!(handed(&[0]).check(1).is_ok());
    assert_eq!(handed(&[0, 1]).check(2).unwrap_err().field, "/streams");
    let owing = SendSpec { mode: Mode::Auto, ..handed(&[0]) };
    assert_eq!(owing.check(1).unwrap_err().field, "/mode");
    let disks = vec![DiskStream { disk: 0, stream: FdIndex(1) }];
    assert_eq!(SendSpec { disks, ..handed(&[0]) }.check(2).unwrap_err().field, "/disks");
}

#[test]
fn streams_in_the_place_of_others_are_counted_too() {
    let reconnect =
        |streams: &[u16]| ReconnectSpec { streams: streams.iter().copied().map(FdIndex).collect() };
    assert!(reconnect(&[0, 1]).check(2).is_ok());
    assert_eq!(reconnect(&[]).check(0).unwrap_err().field, "/streams");
    assert_eq!(reconnect(&[0, 0]).check(2).unwrap_err().field, "/streams/1");
}

/// Builds refuse what they do not know: one of before is told nothing that it need not do.
#[test]
fn what_is_as_ever_is_not_said() {
    let text = serde_json::to_string(&spec(&[0])).unwrap();
    for new in ["mode", "paused", "handed", "disks"] {
        assert!(!text.contains(new), "{text}");
    }
}
