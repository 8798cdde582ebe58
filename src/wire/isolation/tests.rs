use super::*;

#[test]
fn the_name_is_the_one_in_json_for_every_item() {
    for item in Item::ALL {
        assert_eq!(serde_json::to_value(item).unwrap(), item.name());
        assert_eq!(serde_json::from_value::<Item>(item.name().into()).unwrap(), item);
    }
    let missing = Missing { item: Item::Landlock, why: "not in this kernel".to_owned() };
    assert_eq!(missing.to_string(), "landlock: not in this kernel");
    let distinct: std::collections::BTreeSet<_> = Item::ALL.into_iter().collect();
    assert_eq!(distinct.len(), Item::ALL.len());
}
