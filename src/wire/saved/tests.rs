use super::form::{FormError, Section, join, split};
use super::table::{Part, Table};
use super::*;

#[test]
fn a_digest_is_sixty_four_digits_and_nothing_else() {
    let text = "00ff".repeat(16);
    let digest: Digest = text.parse().unwrap();
    assert_eq!((digest.to_string(), digest.0[1]), (text.clone(), 0xFF));
    assert_eq!(serde_json::from_str::<Digest>(&format!("{text:?}")).unwrap(), digest);
    for wrong in ["", &text[1..], &format!("{text}00"), &text.replace("ff", "fg"), &text.replace("00", "+0")]
    {
        assert_eq!(wrong.parse::<Digest>(), Err(DigestError), "{wrong}");
    }
}

#[test]
fn a_descriptor_is_named_once_and_has_arrived() {
    let spec =
        |state, memory| SaveSpec { state: FdIndex(state), memory: FdIndex(memory), base: None, live: None };
    assert_eq!(spec(0, 1).check(2), Ok(()));
    assert_eq!(spec(0, 0).check(2).unwrap_err().field, "/memory");
    assert_eq!(spec(2, 1).check(2).unwrap_err().field, "/state");
    let base = Some(Base { state: FdIndex(1), root: Digest([0; 32]) });
    assert_eq!(SaveSpec { base, ..spec(0, 1) }.check(2).unwrap_err().field, "/base/state");
}

#[test]
fn a_report_without_delays_is_read_and_written_as_ever() {
    let root = "00".repeat(32);
    let old = format!(
        r#"{{"root":"{root}","state_bytes":1,"memory_bytes":2,"stall_us":3,"waits":4,"total_us":5}}"#
    );
    let report: SaveReport = serde_json::from_str(&old).unwrap();
    assert_eq!((report.waits, report.delay), (4, None));
    assert_eq!(serde_json::to_string(&report).unwrap(), old);
    let measured = SaveReport { delay: Some(WriteDelay { us_max: 6, us_sum: 7 }), ..report };
    let text = serde_json::to_string(&measured).unwrap();
    assert_eq!(serde_json::from_str::<SaveReport>(&text).unwrap(), measured);
}

fn part(offset: u64, bytes: u32) -> Part {
    Part { offset, bytes, digest: Digest([1; 32]) }
}

/// A file with one other section before its table.
fn file(parts: Vec<Part>) -> Vec<u8> {
    let shape = Section { name: "shape", version: 1, bytes: b"{}".to_vec() };
    join(&[shape, Table { memory_bytes: 64 << 20, parts }.section()])
}

fn read(file: &[u8]) -> Result<Table, FormError> {
    let mut sections = split(file)?;
    assert_eq!(sections.first_unknown(), Some("shape"));
    assert_eq!(sections.take("shape")?, (1, b"{}".as_slice()));
    let table = Table::parse(&mut sections)?;
    assert_eq!(sections.first_unknown(), None);
    Ok(table)
}

#[test]
fn what_is_joined_is_split_again() {
    let parts = vec![part(0, 4096), part(4096, 1 << 20), part((64 << 20) - 4096, 4096)];
    let table = read(&file(parts.clone())).unwrap();
    assert_eq!((table.memory_bytes, table.bytes()), (64 << 20, 8192 + (1 << 20)));
    assert_eq!(table.parts, parts);
    assert!(parts.iter().all(|part| table.holds(part)));
    assert!(!table.holds(&part(4096, 4096)) && !table.holds(&part(8192, 4096)));
    assert!(!table.holds(&Part { digest: Digest([2; 32]), ..parts[0] }));
    assert_eq!(read(&file(Vec::new())).unwrap().parts, []);
    assert!(state_bytes_max(u64::MAX) > state_bytes_max(64 << 20));
}

#[test]
fn forms_that_cannot_be_are_refused_by_what_is_wrong() {
    let good = file(vec![part(0, 4096)]);
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 13] = [
        ("does not begin", |file| file[0] = b'T'),
        ("has version 2", |file| file[8] = 2),
        ("4294967295 sections", |file| file[12..16].fill(0xFF)),
        ("ends before its end", |file| file.truncate(30)),
        ("ends before its end", |file| file[32..40].fill(0xFF)),
        ("bytes behind its end", |file| file.push(0)),
        ("where nothing should be", |file| file[28] = 1),
        ("in no text", |file| file[16] = 0xFF),
        ("\"shape\" twice", |file| file[42..50].copy_from_slice(b"shape\0\0\0")),
        ("lacks the section \"memory\"", |file| file[42] = b'M'),
        ("memory: it has version 9", |file| file[50] = 9),
        ("memory: its length", |file| file[74] = 2),
        ("memory: a part of 4096 bytes", |file| file[94] = 1),
    ];
    for (wanted, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = read(&bad).expect_err(wanted).to_string();
        assert!(refused.contains(wanted), "{refused} is not {wanted}");
    }
}

#[test]
fn tables_that_cannot_be_are_refused() {
    for parts in [
        vec![part(4096, 4096), part(0, 4096)],
        vec![part(0, 8192), part(4096, 4096)],
        vec![part(0, 0)],
        vec![part(0, 4095)],
        vec![part(1, 4096)],
        vec![part(0, (1 << 20) + 4096)],
        vec![part((64 << 20) - 4096, 8192)],
        vec![part(u64::MAX - 4095, 4096)],
    ] {
        let refused = read(&file(parts.clone())).unwrap_err().to_string();
        assert!(refused.contains("cannot be"), "{refused} for {parts:?}");
    }
}
