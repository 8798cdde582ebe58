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
    let spec = |state, memory| SaveSpec { state: FdIndex(state), memory: FdIndex(memory), live: None };
    assert_eq!(spec(0, 1).check(2), Ok(()));
    assert_eq!(spec(0, 0).check(2).unwrap_err().field, "/memory");
    assert_eq!(spec(2, 1).check(2).unwrap_err().field, "/state");
}
