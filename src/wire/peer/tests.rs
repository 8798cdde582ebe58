use super::*;

fn offer() -> Offer {
    Offer {
        server: "0199e0a0-0000-7000-8000-000000000001".to_owned(),
        name: "web1".to_owned(),
        external_ref: None,
        power: Power::Off,
        runs: false,
        vcpus: 2,
        memory_bytes: 1 << 30,
        saved_bytes: 0,
        cpu: OfferedCpu {
            template: CpuTemplate::Host,
            vendor: "GenuineIntel".to_owned(),
            features: ["sse4_2".to_owned()].into(),
            tsc_khz: None,
        },
        image: Digest([7; 32]),
        image_name: "debian-12".to_owned(),
        disks: vec![OfferedDisk {
            volume: "web1-root".to_owned(),
            size_bytes: 1 << 30,
            written_bytes: 1 << 20,
        }],
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
    assert_eq!(head(start), Ok((Kind::Document, document.len())));
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
                Ok((Kind::Piece, _)) => assert!((6..8).contains(&at)),
                Ok((Kind::Document, length)) => {
                    assert!(at >= 8 && length <= FRAME_BYTES_MAX && length != document.len())
                }
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
    let cases: [Spoil; 15] = [
        |o| o.server.clear(),
        |o| o.name = "x".repeat(200),
        |o| o.image_name.clear(),
        |o| o.vcpus = 0,
        |o| o.vcpus = VCPUS_MAX + 1,
        |o| o.memory_bytes = MEMORY_BYTES_MAX + 1,
        |o| o.cpu.features = (0..=crate::limits::CPU_FEATURES_MAX).map(|at| format!("f{at}")).collect(),
        |o| o.cpu.features = ["sse 4".to_owned()].into(),
        |o| o.cpu.template = CpuTemplate::Features([String::new()].into()),
        |o| o.cpu.vendor = "x".repeat(200),
        |o| o.disks = vec![o.disks[0].clone(); DISKS_MAX + 1],
        |o| o.nics = vec![o.nics[0].clone(); NICS_MAX + 1],
        |o| o.nics[0].mac.clear(),
        |o| o.disks[0].volume.clear(),
        |o| o.external_ref = Some("x".repeat(2000)),
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
    let obstacle = Obstacle { kind: ObstacleKind::State, detail: "it cannot".to_owned() };
    let verdict = |count| serde_json::to_vec(&Message::Verdict { blocked_by: vec![obstacle.clone(); count] });
    assert!(Message::read(&verdict(OBSTACLES_MAX).unwrap()).is_ok());
    assert_eq!(Message::read(&verdict(OBSTACLES_MAX + 1).unwrap()), Err(FrameError::Message));
}

#[test]
fn a_piece_is_read_as_it_was_sent_and_a_short_one_is_none() {
    let piece = Piece { file: 3, offset: u64::MAX, bytes: b"abc" };
    let framed = [piece.head().unwrap(), b"abc".to_vec()].concat();
    let (start, body) = split(&framed);
    assert_eq!(head(start), Ok((Kind::Piece, body.len())));
    assert_eq!(Piece::read(body), Ok(piece));
    for length in 0..PIECE_HEAD_BYTES {
        assert_eq!(Piece::read(&body[..length]), Err(FrameError::Message));
    }
    let long = vec![0; FRAME_BYTES_MAX];
    assert!(matches!(Piece { file: 0, offset: 0, bytes: &long }.head(), Err(FrameError::TooLong(_))));
}

#[test]
fn a_parcel_whose_numbers_are_beyond_any_bound_is_no_message() {
    let parcel = |spoil: fn(&mut Parcel)| {
        let record = serde_json::json!({});
        let mut parcel = Parcel {
            transfer: "x".to_owned(),
            offer: offer(),
            record,
            console_bytes: 4096,
            saved: None,
            live_streams: None,
            may_owe: false,
        };
        spoil(&mut parcel);
        Message::read(&serde_json::to_vec(&Message::Take(Box::new(parcel))).unwrap())
    };
    assert!(parcel(|_| {}).is_ok());
    assert_eq!(parcel(|parcel| parcel.console_bytes = u64::MAX), Err(FrameError::Message));
    assert_eq!(parcel(|parcel| parcel.transfer = "x".repeat(200)), Err(FrameError::Message));
    assert_eq!(parcel(|parcel| parcel.offer.vcpus = 0), Err(FrameError::Message));
    assert!(
        parcel(|parcel| parcel.saved = Some(SavedFiles { state_bytes: 4096, memory_bytes: 4096 })).is_ok()
    );
    assert!(parcel(|parcel| parcel.live_streams = Some(16)).is_ok());
    assert!(parcel(|parcel| parcel.live_streams = Some(17)).is_err());
    assert!(parcel(|parcel| parcel.live_streams = Some(0)).is_err());
    assert!(parcel(|parcel| (parcel.live_streams, parcel.may_owe) = (Some(1), true)).is_ok());
    assert!(parcel(|parcel| parcel.may_owe = true).is_err());
    for files in [(u64::MAX, 1), (1, u64::MAX)] {
        let (state_bytes, memory_bytes) = files;
        let parcel = Parcel {
            transfer: "x".to_owned(),
            offer: offer(),
            record: serde_json::json!({}),
            console_bytes: 0,
            saved: Some(SavedFiles { state_bytes, memory_bytes }),
            live_streams: None,
            may_owe: false,
        };
        assert!(parcel.check().is_err());
    }
}
