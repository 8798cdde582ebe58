use super::*;

fn offer() -> Offer {
    Offer {
        server: "0199e0a0-0000-7000-8000-000000000001".to_owned(),
        name: "web1".to_owned(),
        vcpus: 2,
        memory_bytes: 1 << 30,
        cpu: OfferedCpu {
            template: CpuTemplate::Host,
            vendor: "GenuineIntel".to_owned(),
            features: vec!["sse4_2".to_owned()],
        },
        image: Digest([7; 32]),
        image_name: "debian-12".to_owned(),
        disks: vec![OfferedDisk { size_bytes: 1 << 30, written_bytes: 1 << 20 }],
        nics: vec![OfferedNic {
            network: "default".to_owned(),
            ipv4_cidr: "10.0.0.0/24".to_owned(),
            ipv4: Ipv4Addr::new(10, 0, 0, 2),
            mac: "52:54:00:00:00:01".to_owned(),
        }],
    }
}

fn split(frame: &[u8]) -> ([u8; HEAD_BYTES], &[u8]) {
    let (head, rest) = frame.split_first_chunk().unwrap();
    (*head, rest)
}

#[test]
fn what_is_framed_is_read_again() {
    let message = Message::Ask(Box::new(offer()));
    let frame = message.frame().unwrap();
    let (start, document) = split(&frame);
    assert_eq!(head(start), Ok(document.len()));
    assert_eq!(Message::read(document), Ok(message));
}

#[test]
fn a_head_with_any_byte_wrong_is_refused_or_of_bounded_length() {
    let frame = Message::Refuse { detail: "no".to_owned() }.frame().unwrap();
    let (good, document) = split(&frame);
    for at in 0..HEAD_BYTES {
        for flip in 1..=255_u8 {
            let mut bad = good;
            bad[at] ^= flip;
            match head(bad) {
                Ok(length) => assert!(at >= 8 && length <= FRAME_BYTES_MAX && length != document.len()),
                Err(FrameError::Magic) => assert!(at < 4),
                Err(FrameError::Version(found)) => assert!((4..6).contains(&at) && found != VERSION),
                Err(FrameError::Kind(_)) => assert!((6..8).contains(&at)),
                Err(FrameError::TooLong(length)) => assert!(at >= 8 && length > FRAME_BYTES_MAX),
                Err(FrameError::Message) => panic!("a head holds no message"),
            }
        }
    }
}

#[test]
fn a_message_that_no_reader_would_take_is_not_sent() {
    let long = Message::Refuse { detail: "x".repeat(FRAME_BYTES_MAX) };
    assert!(matches!(long.frame(), Err(FrameError::TooLong(_))));
}

#[test]
fn an_offer_beyond_any_bound_is_no_message() {
    type Spoil = fn(&mut Offer);
    let cases: [Spoil; 11] = [
        |o| o.server.clear(),
        |o| o.name = "x".repeat(200),
        |o| o.image_name.clear(),
        |o| o.vcpus = 0,
        |o| o.vcpus = VCPUS_MAX + 1,
        |o| o.memory_bytes = MEMORY_BYTES_MAX + 1,
        |o| o.cpu.features = vec!["x".to_owned(); FEATURES_MAX + 1],
        |o| o.cpu.vendor = "x".repeat(200),
        |o| o.disks = vec![o.disks[0].clone(); DISKS_MAX + 1],
        |o| o.nics = vec![o.nics[0].clone(); NICS_MAX + 1],
        |o| o.nics[0].mac.clear(),
    ];
    for (at, spoil) in cases.iter().enumerate() {
        let mut bad = offer();
        spoil(&mut bad);
        let document = serde_json::to_vec(&Message::Ask(Box::new(bad))).unwrap();
        assert_eq!(Message::read(&document), Err(FrameError::Message), "case {at}");
    }
}

#[test]
fn a_verdict_of_too_many_obstacles_is_no_message() {
    let obstacle = Obstacle { kind: ObstacleKind::Vmm, detail: "it cannot".to_owned() };
    let verdict = |count| serde_json::to_vec(&Message::Verdict { blocked_by: vec![obstacle.clone(); count] });
    assert!(Message::read(&verdict(OBSTACLES_MAX).unwrap()).is_ok());
    assert_eq!(Message::read(&verdict(OBSTACLES_MAX + 1).unwrap()), Err(FrameError::Message));
}
